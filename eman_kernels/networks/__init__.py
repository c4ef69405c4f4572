"""Networks and tensors: what they hold, which teacher tensor follows which student tensor, and by which rule."""
