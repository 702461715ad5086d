"""Tests of the relay, and the stand-in for the central XNAT they talk to."""
