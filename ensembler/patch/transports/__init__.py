"""Ways in which a patch is carried to another base, beside plain addition: one in each file, with its paper."""
