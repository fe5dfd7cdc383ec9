"""The same exchange on another system, side by side."""
