"""What tests share: devices, coordinators, runs, files."""
