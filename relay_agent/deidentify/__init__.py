"""De-identify: runs the scripts that a route names over a shipment, before anybody looks at it and before it leaves.

The result lies beside the spool, in ``data/deidentified/<shipment>/``, until the shipment is purged: what a person
approved and what is shipped are the same files. Everything that cannot be done exactly as the scripts say holds the
shipment, with the script, the place in it, the tag and the reason, never the value.
"""
