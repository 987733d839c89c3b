"""How fast the parts are, each measured in one run beside the way it is compared with."""
