"""What a plan asks of training beside the steps themselves: one file for each of its fields."""
