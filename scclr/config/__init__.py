"""Configuration: its schema, its composition from YAML and the command line, and the components that it names."""
