//! Images: what is known of each, the names it goes by, its manifests.

use crate::{Durability, SqlExt, Store};
use rusqlite::params;
use types::{Result, ResultExt};

/// An image as it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageRecord {
    /// The digest of its configuration, `sha256:…`.
    pub id: String,
    /// The chain id of its top layer, or "" for an image without layers.
    pub chain_id: String,
    /// Bytes to download: layers as transferred, configuration, manifest.
    pub size: u64,
    /// When it came to this node, in nanoseconds since the epoch.
    pub created_at_ns: i64,
    /// The configuration, byte for byte.
    pub config: Vec<u8>,
    /// Full names, by tag and by digest, in order.
    pub references: Vec<String>,
}

/// A manifest through which an image came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ManifestRecord {
    /// Its digest.
    pub digest: String,
    /// Its media type.
    pub media_type: String,
    /// Its bytes.
    pub body: Vec<u8>,
}

impl Store {
    /// Writes an image durably. `image.references` are added to those that it
    /// has; a name that stood for another image moves.
    ///
    /// # Errors
    /// When it can't be committed.
    pub async fn put_image(&self, image: ImageRecord, manifest: Option<ManifestRecord>) -> Result<()> {
        self.write(Durability::Full, move |t| {
            let what = || format!("store image {}", image.id);
            let size = i64::try_from(image.size).context(what)?;
            t.execute(
                "INSERT INTO images (id, chain_id, size, created_at_ns, config) VALUES (?1,?2,?3,?4,?5)
                 ON CONFLICT (id) DO UPDATE SET chain_id=?2, size=?3, config=?5",
                params![image.id, image.chain_id, size, image.created_at_ns, image.config],
            )
            .sql(what)?;
            for reference in &image.references {
                t.execute(
                    "INSERT OR REPLACE INTO image_refs (reference, image_id) VALUES (?1, ?2)",
                    params![reference, image.id],
                )
                .sql(what)?;
            }
            if let Some(m) = &manifest {
                t.execute(
                    "INSERT OR REPLACE INTO image_manifests (digest, image_id, media_type, body) VALUES (?1,?2,?3,?4)",
                    params![m.digest, image.id, m.media_type, m.body],
                )
                .sql(what)?;
            }
            Ok(())
        })
        .await
    }

    /// Forgets an image with all its names; an unknown one is no error.
    ///
    /// # Errors
    /// When it can't be committed.
    pub async fn delete_image(&self, id: &str) -> Result<()> {
        let id = id.to_owned();
        self.write_end(Durability::Full, move |t| {
            for sql in [
                "DELETE FROM image_refs WHERE image_id=?1",
                "DELETE FROM image_manifests WHERE image_id=?1",
                "DELETE FROM images WHERE id=?1",
            ] {
                t.execute(sql, [&id]).sql(|| format!("delete image {id}"))?;
            }
            Ok(())
        })
        .await
    }

    /// Every image with its names, in the order they came.
    ///
    /// # Errors
    /// When the database can't be read.
    pub async fn images(&self) -> Result<Vec<ImageRecord>> {
        self.read(|c| {
            let what = || "list the images".to_owned();
            let mut images: Vec<ImageRecord> = c
                .prepare("SELECT id, chain_id, size, created_at_ns, config FROM images ORDER BY created_at_ns, id")
                .and_then(|mut s| {
                    s.query_map([], |row| {
                        Ok(ImageRecord {
                            id: row.get(0)?,
                            chain_id: row.get(1)?,
                            size: u64::try_from(row.get::<_, i64>(2)?).unwrap_or(0),
                            created_at_ns: row.get(3)?,
                            config: row.get(4)?,
                            references: Vec::new(),
                        })
                    })?
                    .collect()
                })
                .sql(what)?;
            let mut names =
                c.prepare("SELECT reference FROM image_refs WHERE image_id=?1 ORDER BY reference").sql(what)?;
            for image in &mut images {
                image.references =
                    names.query_map([&image.id], |row| row.get(0)).and_then(std::iter::Iterator::collect).sql(what)?;
            }
            Ok(images)
        })
        .await
    }

    /// The manifests through which an image came.
    ///
    /// # Errors
    /// When the database can't be read.
    pub async fn manifests(&self, image_id: &str) -> Result<Vec<ManifestRecord>> {
        let id = image_id.to_owned();
        self.read(move |c| {
            c.prepare("SELECT digest, media_type, body FROM image_manifests WHERE image_id=?1 ORDER BY digest")
                .and_then(|mut s| {
                    s.query_map([&id], |row| {
                        Ok(ManifestRecord { digest: row.get(0)?, media_type: row.get(1)?, body: row.get(2)? })
                    })?
                    .collect()
                })
                .sql(|| format!("read the manifests of image {id}"))
        })
        .await
    }
}
