"""What a transformed model knows about itself: prunable parameters, masks, channels and the state that follows them."""
