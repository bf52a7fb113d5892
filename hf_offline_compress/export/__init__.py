"""Export of a compressed folder to formats that other tools load."""
