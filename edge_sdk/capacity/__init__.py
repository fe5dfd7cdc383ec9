"""What fits a device: costs of each segment, and the deepest exit within memory and deadline."""
