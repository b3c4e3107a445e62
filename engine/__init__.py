"""How one device trains many clients: the seam to the method, programs, seeds, devices."""
