"""Vision encoders and audio encoders: media tensors in, `Features` out."""
