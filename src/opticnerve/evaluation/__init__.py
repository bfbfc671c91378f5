"""What a trained model can do, whether it looks, and what it forgot."""
