"""What turns the predictions on weak views into pseudo-labels."""
