"""What `prove` compares: places, their answers and their memory."""
