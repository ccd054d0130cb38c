//! `images`, `pull`, `import`, `rmi`.

use super::Context;
use super::args::{ImportArgs, ListArgs, PullArgs, RmiArgs};
use super::client::{Answer, Client, all_of};
use super::output::{Table, print, print_json, shown_id, size, to_json};
use proto::admin::ImportRequest;
use proto::cri::{Image, ImageSpec, ImageStatusRequest, ListImagesRequest, PullImageRequest, RemoveImageRequest};
use serde_json::json;
use std::io::IsTerminal;
use types::{Error, Result, ResultExt};

fn spec(image: &str) -> ImageSpec {
    ImageSpec { image: image.to_string(), user_specified_image: image.to_string(), ..ImageSpec::default() }
}

async fn all(client: &mut Client) -> Result<Vec<Image>> {
    Ok(client.images.list_images(ListImagesRequest::default()).await.answer(|| "list images".to_string())?.images)
}

/// Lists images, a row per tag.
pub async fn list(context: &Context, args: &ListArgs) -> Result<()> {
    let mut client = context.connect().await?;
    let answer = client.images.list_images(ListImagesRequest::default()).await;
    let list = answer.answer(|| "list images".to_string())?;
    if context.json() {
        return print_json(&to_json("runtime.v1.ListImagesResponse", &list)?);
    }
    if args.quiet {
        return print(&list.images.iter().map(|i| format!("{}\n", i.id)).collect::<String>());
    }
    let mut rows: Vec<Vec<String>> = Vec::new();
    for image in &list.images {
        for (name, tag) in names(image) {
            rows.push(vec![name, tag, shown_id(&image.id, args.no_trunc), size(image.size)]);
        }
    }
    rows.sort();
    let mut table = Table::new(&["IMAGE", "TAG", "IMAGE ID", "SIZE"]);
    rows.into_iter().for_each(|row| table.row(row));
    print(&table.render())
}

/// Name and tag of each tag; an image without any is shown once, by its digest's
/// name or without one.
fn names(image: &Image) -> Vec<(String, String)> {
    let none = || "<none>".to_string();
    if image.repo_tags.is_empty() {
        let name = image.repo_digests.first().and_then(|d| d.split_once('@')).map(|(name, _)| name.to_string());
        return vec![(name.unwrap_or_else(none), none())];
    }
    let split = |tag: &String| match tag.rsplit_once(':') {
        // A colon before the last slash is that of a registry's port.
        Some((name, tag)) if !tag.contains('/') => (name.to_string(), tag.to_string()),
        _ => (tag.clone(), none()),
    };
    image.repo_tags.iter().map(split).collect()
}

/// What the daemon knows of an image; `None` where it has none of that name or id.
pub async fn status(client: &mut Client, given: &str) -> Result<Option<Image>> {
    let image = resolve(client, given).await?;
    let request = ImageStatusRequest { image: Some(spec(&image)), verbose: false };
    Ok(client.images.image_status(request).await.answer(|| format!("look for image {given}"))?.image)
}

/// The id for the beginning of one, else what was given: references are the
/// daemon's to read.
pub async fn resolve(client: &mut Client, given: &str) -> Result<String> {
    let bare = given.strip_prefix("sha256:").unwrap_or(given);
    if bare.len() < 3 || !bare.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Ok(given.to_string());
    }
    let images = all(client).await?;
    let hex = |i: &Image| i.id.rsplit(':').next().unwrap_or_default().to_string();
    let found: Vec<&Image> = images.iter().filter(|i| hex(i).starts_with(bare)).collect();
    match found.as_slice() {
        [] => Ok(given.to_string()),
        [one] => Ok(one.id.clone()),
        many => {
            let shown: Vec<String> = many.iter().map(|i| shown_id(&i.id, false)).collect();
            Err(Error::invalid(format!("{given:?} may be any of {} images: {}", many.len(), shown.join(", ")))
                .hint("give more of the id"))
        }
    }
}

/// Pulls an image and gives its id.
pub async fn pull_image(client: &mut Client, image: &str) -> Result<String> {
    if std::io::stderr().is_terminal() {
        eprintln!("Pulling {image}");
    }
    let request = PullImageRequest { image: Some(spec(image)), ..PullImageRequest::default() };
    Ok(client.images.pull_image(request).await.answer(|| format!("pull {image}"))?.image_ref)
}

/// Pulls an image.
pub async fn pull(context: &Context, args: &PullArgs) -> Result<()> {
    let mut client = context.connect().await?;
    let id = pull_image(&mut client, &args.image).await?;
    if context.json() {
        return print_json(&json!({"imageRef": id}));
    }
    print(&format!("{id}\n"))
}

/// Imports an archive or a layout folder.
pub async fn import(context: &Context, args: &ImportArgs) -> Result<()> {
    let mut client = context.connect().await?;
    // The daemon's working directory is not ours.
    let path = std::fs::canonicalize(&args.file).context(|| format!("import {}", args.file.display()))?;
    let path = path
        .into_os_string()
        .into_string()
        .map_err(|p| Error::invalid(format!("import {}: its path is not UTF-8", p.display())))?;
    let request = ImportRequest { path, reference: args.name.clone() };
    let answer = client.admin.import(request).await.answer(|| format!("import {}", args.file.display()))?;
    if context.json() {
        return print_json(&to_json("longshore.admin.v1.ImportResponse", &answer)?);
    }
    let mut text = String::new();
    for image in answer.images {
        match image.references.as_slice() {
            [] => text.push_str(&format!("{}\n", image.id)),
            names => text.extend(names.iter().map(|name| format!("{} {name}\n", shown_id(&image.id, false)))),
        }
    }
    print(&text)
}

/// Removes images; goes on after a failure and reports all.
pub async fn remove(context: &Context, args: &RmiArgs) -> Result<()> {
    let mut client = context.connect().await?;
    let mut failures = Vec::new();
    for given in &args.images {
        match remove_one(&mut client, given).await {
            Ok(()) => print(&format!("{given}\n"))?,
            Err(e) => failures.push(e),
        }
    }
    all_of("remove images", failures)
}

async fn remove_one(client: &mut Client, given: &str) -> Result<()> {
    // CRI's RemoveImage succeeds for what is not there; a person who mistyped a name
    // wants to know.
    if status(client, given).await?.is_none() {
        return Err(Error::not_found(format!("no image has the name or id {given:?}"))
            .hint("'longshore images' lists what there is"));
    }
    let image = resolve(client, given).await?;
    let request = RemoveImageRequest { image: Some(spec(&image)) };
    client.images.remove_image(request).await.answer(|| format!("remove image {given}"))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_are_told_from_ports() {
        let image = Image {
            repo_tags: vec!["docker.io/library/busybox:1.36".into(), "localhost:5000/x".into()],
            ..Image::default()
        };
        let split = names(&image);
        assert_eq!(split[0], ("docker.io/library/busybox".to_string(), "1.36".to_string()));
        assert_eq!(split[1], ("localhost:5000/x".to_string(), "<none>".to_string()));
        let image = Image { repo_digests: vec!["a/b@sha256:00".into()], ..Image::default() };
        assert_eq!(names(&image), [("a/b".to_string(), "<none>".to_string())]);
    }
}
