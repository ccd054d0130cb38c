//! `inspect`: all that the daemon knows of a pod, a container or an image, in the
//! form of crictl's inspect commands.

use super::args::InspectArgs;
use super::client::{Answer, Client};
use super::find::{Target, target};
use super::output::{print_json, to_json};
use super::{Context, find, images};
use proto::cri::{ContainerStatusRequest, ImageSpec, ImageStatusRequest, PodSandboxStatusRequest};
use serde_json::{Map, Value};
use std::collections::HashMap;
use types::{Error, Result};

/// Prints one JSON document per argument.
pub async fn inspect(context: &Context, args: &InspectArgs) -> Result<()> {
    let mut client = context.connect().await?;
    let (pods, containers) = (find::pods(&mut client).await?, find::containers(&mut client).await?);
    for given in &args.targets {
        let document = match target(given, &pods, &containers) {
            Ok(Target::Pod(pod)) => inspect_pod(&mut client, pod.id).await?,
            Ok(Target::Container(container)) => inspect_container(&mut client, container.id).await?,
            Err(e) if e.is_not_found() => inspect_image(&mut client, given).await?,
            Err(e) => return Err(e),
        };
        print_json(&document)?;
    }
    Ok(())
}

async fn inspect_pod(client: &mut Client, id: String) -> Result<Value> {
    let request = PodSandboxStatusRequest { pod_sandbox_id: id.clone(), verbose: true };
    let answer = client.runtime.pod_sandbox_status(request).await.answer(|| format!("inspect pod {id}"))?;
    let status = answer.status.unwrap_or_default();
    Ok(document(to_json("runtime.v1.PodSandboxStatus", &status)?, answer.info))
}

async fn inspect_container(client: &mut Client, id: String) -> Result<Value> {
    let request = ContainerStatusRequest { container_id: id.clone(), verbose: true };
    let answer = client.runtime.container_status(request).await.answer(|| format!("inspect container {id}"))?;
    let status = answer.status.unwrap_or_default();
    Ok(document(to_json("runtime.v1.ContainerStatus", &status)?, answer.info))
}

async fn inspect_image(client: &mut Client, given: &str) -> Result<Value> {
    let image = images::resolve(client, given).await?;
    let spec = ImageSpec { image, ..ImageSpec::default() };
    let request = ImageStatusRequest { image: Some(spec), verbose: true };
    let answer = client.images.image_status(request).await.answer(|| format!("inspect image {given}"))?;
    let image = answer.image.ok_or_else(|| {
        Error::not_found(format!("no pod, container or image has the name or id {given:?}"))
            .hint("'longshore ps -a' and 'longshore images' list what there is")
    })?;
    Ok(document(to_json("runtime.v1.Image", &image)?, answer.info))
}

/// Status and verbose information in one object; an information that is JSON itself
/// is put in as such.
fn document(status: Value, info: HashMap<String, String>) -> Value {
    let mut all = Map::new();
    for (key, text) in info {
        all.insert(key, serde_json::from_str(&text).unwrap_or(Value::String(text)));
    }
    all.insert("status".to_string(), status);
    Value::Object(all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn info_that_is_json_is_put_in_as_such() {
        let info = [("info", r#"{"pid":7}"#), ("note", "plain words")];
        let info = info.map(|(k, v)| (k.to_string(), v.to_string())).into();
        let all = document(json!({"id": "x"}), info);
        assert_eq!(all, json!({"status": {"id": "x"}, "info": {"pid": 7}, "note": "plain words"}));
    }
}
