"""Checks of the repository itself: rules that every role, play and inventory keeps."""
