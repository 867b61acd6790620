"""What a trained model is worth: scores with their denominators, the bar it must clear, pictures, proofs of equality."""
