"""Raw k-space data of Siemens scanners (TWIX): is it complete, whose is it, and without whose name does it leave."""
