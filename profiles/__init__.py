"""Device profiles: what a device can hold and how fast it is, with a pure cost model over them."""
