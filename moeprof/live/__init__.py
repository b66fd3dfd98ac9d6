"""The same techniques executed on a device."""
