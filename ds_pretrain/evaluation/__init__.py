"""What a trained model is worth: scores and their denominators, the bar to clear, pictures, proofs of equality."""
