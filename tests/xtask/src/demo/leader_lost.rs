//! Step e: the leader is lost, another one leads, traffic does not notice.

use std::time::Duration;

use anyhow::{Result, ensure};

use super::{
    load::Load,
    mesh::{Mesh, text, wait},
    moves::apply,
    report::{Report, seconds},
};

/// How soon there must be a new leader.
const ELECTED: Duration = Duration::from_secs(10);

/// A small application that is applied while the old leader is dead.
const NEWS: &str = "\
apiVersion: weft.dev/v1alpha1
kind: MeshApplication
metadata: { name: news, namespace: shop }
spec:
  services:
    - { name: reader, command: [bookinfo, idle], requests: { cpu: 50m, memory: 16Mi } }
";

/// Kills the leader, applies something at once, and starts the lead again.
pub(super) fn show(mesh: &Mesh, report: &Report, load: &Load) -> Result<()> {
    let old = mesh.leader()?;
    report.step(&format!("e. the leader, lead {old}, is killed"));
    let mark = load.mark();
    let machine = format!("lead-{old}");
    mesh.lab("kill", &[&machine])?;
    let elected = wait("there is another leader", ELECTED, || {
        let new = mesh.leader()?;
        ensure!(new != old, "lead {old} is dead and still named the leader");
        Ok(())
    });
    let new = mesh.leader().unwrap_or_default();
    report.claim(
        "another lead leads",
        elected
            .map(|time| format!("lead {new} after {}", seconds(time)))
            .map_err(|error| format!("{error:#}")),
    );
    let applied = apply(mesh, "news", NEWS).and_then(|()| {
        wait("the new application runs", Duration::from_secs(20), || {
            let apps = mesh.get("applications")?;
            let ready = |app: &serde_json::Value| {
                text(app, "name") == "shop/news" && app["ready"] == app["wanted"]
            };
            ensure!(apps.iter().any(ready), "shop/news is not ready");
            Ok(())
        })
    });
    report.claim(
        "an apply right after works",
        applied
            .map(|time| format!("ready after {}", seconds(time)))
            .map_err(|error| format!("{error:#}")),
    );
    mesh.cli(&["delete", "shop/news"])?;
    mesh.lab("start", &[&machine])?;
    report.claim(
        "no request failed without the leader",
        load.since(mark)?.flawless(),
    );
    Ok(())
}
