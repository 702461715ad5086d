"""Receive and stage, tried with real senders, raw bytes and real faults."""
