"""Plan the memory and the devices of members from configs and headers, before anything is loaded."""
