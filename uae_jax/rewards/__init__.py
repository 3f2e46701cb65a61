"""What is rewarded: similarity of images, or of captions and images, under frozen encoders."""
