"""Side by side with `cp` and with the real converters, in one sitting: ratios, memory, start-up. `make bench`."""
