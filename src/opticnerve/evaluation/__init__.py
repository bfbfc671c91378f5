"""What a trained model can do, whether it looks, and what it forgot: scores, the run card, and its plots."""
