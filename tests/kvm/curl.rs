//! A VM's life by `curl`, as scripts lead it.

use std::fs;
use std::process::Command;

use serde_json::{Value, json};

use crate::attentive::attentive;
use crate::served::{Served, eventually};

/// The answer's status and body. `PUT` without a body is `-X PUT`, as people write it.
fn curl(served: &Served, method: &str, name: &str, body: Option<&Value>) -> (u16, Value) {
    let mut command = Command::new("curl");
    command
        .args([
            "--silent",
            "--show-error",
            "--max-time",
            "30",
            "--write-out",
            "\n%{http_code}",
        ])
        .arg("--unix-socket")
        .arg(served.path("api"))
        .args(["-X", method]);
    if let Some(body) = body {
        command.args([
            "-H",
            "Content-Type: application/json",
            "-d",
            &body.to_string(),
        ]);
    }
    command.arg(format!("http://localhost/api/v1/{name}"));
    let done = command.output().unwrap();
    let errors = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{name}: {errors}");
    let text = String::from_utf8(done.stdout).unwrap();
    let (body, status) = text.rsplit_once('\n').unwrap();
    (
        status.parse().unwrap(),
        serde_json::from_str(body).unwrap_or_default(),
    )
}

#[test]
fn curl_leads_a_vm_through_its_life() {
    if Command::new("curl").arg("--version").output().is_err() {
        return eprintln!("skipped: there is no curl");
    }
    let Some(served) = Served::start(&[]) else {
        return;
    };
    let put = |name: &str, body: Option<Value>| curl(&served, "PUT", name, body.as_ref());
    let (status, ping) = curl(&served, "GET", "vmm.ping", None);
    assert!(status == 200 && ping["pid"].is_u64(), "{ping}");
    let disk = served.path("disk");
    fs::write(&disk, [0; 4096]).unwrap();
    let vm = served.vm(&attentive());
    for round in 0..2 {
        assert_eq!(put("vm.create", Some(vm.clone())).0, 204, "{round}");
        assert_eq!(put("vm.boot", None).0, 204);
        let (status, added) = put("vm.add-disk", Some(json!({ "path": disk, "id": "data" })));
        assert_eq!((status, &added["id"]), (200, &json!("data")));
        assert_eq!(
            (put("vm.pause", None).0, put("vm.pause", None).0),
            (204, 500)
        );
        assert_eq!(curl(&served, "GET", "vm.info", None).1["state"], "Paused");
        assert_eq!(put("vm.resume", None).0, 204);
        assert_eq!(
            put("vm.remove-device", Some(json!({ "id": "data" }))).0,
            204
        );
        eventually("it is gone", || {
            let (_, info) = curl(&served, "GET", "vm.info", None);
            info["device_tree"].get("data").is_none()
        });
        let (status, why) = put("vm.resize", Some(json!({ "desired_vcpus": 5 })));
        assert_eq!(status, 400, "four is all that there can be: {why}");
        // What nobody reads may be as long as it likes.
        let long = json!({ "nonsense": "x".repeat(100_000), "id": "nobody" });
        assert_eq!(put("vm.remove-device", Some(long)).0, 404);
        assert_eq!(put("vm.shutdown", None).0, 204);
        assert_eq!(put("vm.delete", None).0, 204);
        assert_eq!(curl(&served, "GET", "vm.info", None).0, 404);
    }
    assert_eq!(put("vmm.shutdown", None).0, 200);
    assert_eq!(served.ended().0.code(), Some(0));
}
