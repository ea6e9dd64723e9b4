"""Next-token prediction on worked problems, for models too small to be found anywhere."""
