"""From the socket to proof of arrival at the stand-in for the central XNAT, and through every fault on the way."""
