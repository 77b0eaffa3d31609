"""What methods of training do: each at its own best learning rate, over settings and seeds."""
