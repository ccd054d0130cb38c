//! Images: references, registries, the content store, unpacking, garbage collection.
