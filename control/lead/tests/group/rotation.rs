//! The mesh's authority is replaced while the leads run and changes are made.

use std::{
    fs,
    path::Path,
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use control_api::http::ApplyResponse;
use http::StatusCode;
use netmanager_api::identity::{Access, Role};
use weft_lead::authority::{self, rotation};

use crate::{
    goal,
    members::leads,
    mesh::{LIMIT, TestMesh, request_by, wait_for},
};

const LEADS: [&str; 3] = ["a", "b", "c"];

/// A user's folder, of which `ca.crt` is another.
fn copy(mesh: &TestMesh, from: &str, to: &str, authorities: &Path) {
    let (from, to) = (mesh.path().join(from), mesh.path().join(to));
    fs::create_dir(&to).unwrap();
    for file in ["tls.crt", "tls.key"] {
        fs::copy(from.join(file), to.join(file)).unwrap();
    }
    fs::copy(authorities, to.join("ca.crt")).unwrap();
}

/// Gives every lead the authorities' certificates, one after the other, and waits until all go by them.
async fn distribute(mesh: &TestMesh, asked_as: &Mutex<String>) {
    let ca = mesh.path().join("ca/ca.crt");
    for lead in LEADS {
        fs::copy(&ca, mesh.path().join(format!("lead-{lead}/ca.crt"))).unwrap();
    }
    let count = fs::read_to_string(ca).unwrap().matches("BEGIN").count();
    wait_for("every lead to take the authorities", LIMIT, async || {
        let who = asked_as.lock().unwrap().clone();
        let (_, text) = mesh.ask_as(&who, "a", "GET", "/v1/leads").await;
        let list: control_api::http::List<control_api::http::Lead> =
            serde_json::from_str(&text).unwrap();
        list.items.len() == LEADS.len() && list.items.iter().all(|it| it.authorities.len() == count)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_authority_is_replaced_without_a_failed_change_and_the_old_one_counts_no_more() {
    let mesh = TestMesh::start(&LEADS).await;
    mesh.leader().await;
    // One that does not answer at once says none.
    wait_for("every lead's authority", LIMIT, async || {
        let leads = leads(&mesh, "a").await;
        leads.iter().all(|lead| lead.authorities.len() == 1)
    })
    .await;
    let ca = mesh.path().join("ca");
    let (writer, is_over) = (Mutex::new("user".to_owned()), AtomicBool::new(false));
    let writing = async {
        let mut made = 0;
        while !is_over.load(Ordering::Relaxed) {
            for lead in LEADS {
                let who = writer.lock().unwrap().clone();
                let change = goal(&format!("app{made}"));
                let (status, text) = mesh
                    .ask_with(&who, lead, ("POST", "/v1/applications"), &change)
                    .await;
                assert_eq!(status, StatusCode::OK, "{lead} as {who}: {text}");
                serde_json::from_str::<ApplyResponse>(&text).unwrap();
                made += 1;
            }
        }
        made
    };
    let replacing = async {
        rotation::prepare(&ca).unwrap();
        distribute(&mesh, &writer).await;
        copy(&mesh, "user", "user-old", &ca.join("ca.crt"));
        *writer.lock().unwrap() = "user-old".to_owned();
        let open = mesh.channel("user-old", "b");
        let on_open = async || request_by(open.clone(), "GET", "/v1/status").await.ok();
        assert_eq!(on_open().await, Some(200));

        rotation::switch(&ca).unwrap();
        for lead in LEADS {
            rotation::renew(&ca, &mesh.path().join(format!("lead-{lead}"))).unwrap();
        }
        let role = Role::User {
            name: "user".to_owned(),
            access: Access::Admin,
        };
        authority::issue(&ca, role, &mesh.path().join("user-new")).unwrap();
        *writer.lock().unwrap() = "user-new".to_owned();
        // Only the new authority counts to this one: every lead shows its new certificate.
        rotation::retire(&ca).unwrap();
        copy(&mesh, "user-new", "strict", &ca.join("ca.crt"));
        for lead in LEADS {
            wait_for("a lead to show its new certificate", LIMIT, async || {
                let channel = mesh.channel("strict", lead);
                request_by(channel, "GET", "/v1/status").await.is_ok()
            })
            .await;
        }
        assert_eq!(on_open().await, Some(200), "both authorities count");
        distribute(&mesh, &writer).await;
        for lead in LEADS {
            let channel = mesh.channel("user-old", lead);
            let answer = request_by(channel, "GET", "/v1/status").await;
            assert!(answer.is_err(), "{lead}: {answer:?}");
        }
        wait_for("the old connection to end", LIMIT, async || {
            on_open().await.is_none()
        })
        .await;
        is_over.store(true, Ordering::Relaxed);
    };
    let (made, ()) = tokio::join!(writing, replacing);
    assert!(made > 3 * LEADS.len(), "{made} changes");
    mesh.end().await;
}
