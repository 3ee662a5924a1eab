"""What the TPU compiler says about a program that never ran: whether it fits, what it does, how long that takes."""
