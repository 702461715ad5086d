"""Builds the stick that turns bare hardware into a relay box. Each module is named by what it makes."""
