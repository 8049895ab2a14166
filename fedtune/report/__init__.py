"""What runs look like to people: one page (`page`), figures of a comparison (`figures`), trackers (`trackers`)."""
