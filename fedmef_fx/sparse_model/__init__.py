"""What a transformed model knows about itself: facts, masks, channels and the state that follows them."""
