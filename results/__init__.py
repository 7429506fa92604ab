"""Published rows and the code that sets our figures beside them."""
