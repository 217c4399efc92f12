"""Evaluation protocols on the features of a frozen encoder."""
