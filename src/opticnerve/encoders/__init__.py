"""Eyes and ears: media tensors in, `Features` out."""
