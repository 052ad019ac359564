"""What a transformed model knows about itself: prunable parameters, masks, channels and the state that follows them."""

from fedmef_fx.sparse_model.averages import watch_averages
from fedmef_fx.sparse_model.replicas import watch_wrappers

# Nothing makes, loads or unpickles a transformed model without this room, so what is done with one is watched from the
# first one on.
watch_averages()
watch_wrappers()
