//! For tests only: temporary roots, test images, peers' daemons.
