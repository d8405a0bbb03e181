//! A process that has no VM, and is told what to do: what needs no KVM.

use std::thread::{self, JoinHandle};

use serde_json::json;

use super::*;
use crate::machine::{self, RunError};

/// Does what is asked until it is told to end.
fn process(requests: Requests) -> JoinHandle<Result<(), RunError>> {
    let bounds = machine::ProcessBounds::default();
    thread::spawn(move || machine::serve(None, false, None, bounds, requests))
}

#[test]
fn a_vm_is_said_changed_shown_and_forgotten_without_being_booted() {
    let requests = Requests::new().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("api");
    let server = Server::start(&SocketAddress::Path(socket.clone()), requests.control()).unwrap();
    let process = process(requests);
    let mut client = Client::new(&socket);
    let mut put = |name: &str, body: Option<Value>| {
        let body = body.map_or_else(String::new, |body| body.to_string());
        let length = format!("Content-Length: {}\r\n", body.len());
        client.send(request("PUT", name, &length) + &body);
        client.reply().unwrap()
    };
    let info = || Client::new(&socket).ask("GET", "vm.info");
    assert_eq!(info().status, 404);
    assert_eq!(info().messages()[1], "VM is not created");
    let kernel = folder.path().join("none");
    let vm =
        json!({ "payload": { "kernel": kernel }, "cpus": { "boot_vcpus": 1, "max_vcpus": 2 } });
    for (name, body, status) in [
        ("vm.add-disk", Some(json!({ "path": "/a" })), 404),
        ("vm.remove-device", Some(json!({ "id": "a" })), 404),
        ("vm.boot", None, 404),
        ("vm.resume", None, 500),
        ("vm.delete", None, 204),
        ("vm.create", Some(json!({ "memory": { "size": 1 } })), 400),
        ("vm.create", Some(vm.clone()), 204),
        ("vm.create", Some(vm), 500),
        ("vm.shutdown", None, 500),
        ("vm.add-disk", Some(json!({ "path": "/a", "id": "a" })), 204),
        ("vm.add-disk", Some(json!({ "path": "/b", "id": "a" })), 409),
        (
            "vm.add-disk",
            Some(json!({ "path": "/b", "queue_size": 3 })),
            400,
        ),
        ("vm.add-net", Some(json!({ "id": "n" })), 204),
        (
            "vm.add-device",
            Some(json!({ "path": "01:00.0", "id": "d" })),
            204,
        ),
        ("vm.add-device", Some(json!({ "path": "01:00.0" })), 409),
        (
            "vm.add-device",
            Some(json!({ "path": "02:00.0", "id": "a" })),
            409,
        ),
        ("vm.remove-device", Some(json!({ "id": "n" })), 204),
        ("vm.remove-device", Some(json!({ "id": "n" })), 404),
        // There is no such kernel.
        ("vm.boot", None, 500),
    ] {
        let reply = put(name, body);
        let said = String::from_utf8_lossy(&reply.body).into_owned();
        assert_eq!(reply.status, status, "{name}: {said}");
    }
    let shown = info().json();
    assert_eq!(shown["state"], "Created");
    assert_eq!(shown["config"]["cpus"]["max_vcpus"], 2);
    assert_eq!(shown["config"]["disks"][0]["id"], "a");
    assert_eq!(shown["config"]["devices"][0]["id"], "d");
    assert_eq!(shown["config"].get("net"), None);
    assert_eq!(put("vm.delete", None).status, 204);
    assert_eq!(info().status, 404);
    client.send(request("PUT", "vmm.shutdown", ""));
    assert!(process.join().unwrap().is_ok());
    server.finish();
    // Answered when the process is at its end.
    assert_eq!(client.reply().unwrap().status, 200);
}

#[test]
fn what_a_vm_is_to_be_does_not_grow_without_bound() {
    let requests = Requests::new().unwrap();
    let control = requests.control();
    let process = process(requests);
    control
        .ask(Request::Create(Box::default(), machine::Handed::default()))
        .unwrap();
    let add = || {
        let net = VirtioConfig::Net(crate::config::NetConfig::default());
        control.ask(Request::AddVirtio(Box::new(net), machine::Files::default()))
    };
    for number in 0..256 {
        add().unwrap_or_else(|error| panic!("NIC {number}: {error}"));
    }
    let why = add().unwrap_err().to_string();
    assert_eq!(why, "a VM that is not booted yet takes 256 devices at most");
    let _gone = control.ask(Request::End(Extent::Process));
    assert!(process.join().unwrap().is_ok());
}

#[test]
fn the_descriptors_of_a_nic_are_kept_until_it_goes_or_the_vm_does() {
    let requests = Requests::new().unwrap();
    let control = requests.control();
    let process = process(requests);
    let create = || control.ask(Request::Create(Box::default(), machine::Handed::default()));
    for how in [
        Request::RemoveDevice {
            id: "n".into(),
            force: false,
            limit: None,
            wait: false,
        },
        Request::End(Extent::Definition),
    ] {
        let _there = create();
        let (mut reader, writer) = io::pipe().unwrap();
        let net = VirtioConfig::Net(crate::config::NetConfig {
            id: Some("n".into()),
            ..crate::config::NetConfig::default()
        });
        let files = crate::machine::Files::from(vec![writer.into()]);
        let added = control.ask(Request::AddVirtio(Box::new(net), files));
        assert_eq!(added, Ok(Answer::Done));
        assert_eq!(control.ask(how), Ok(Answer::Done));
        // Its end, as soon as no copy of the writer is open any more.
        assert_eq!(reader.read(&mut [0]).unwrap(), 0);
    }
    let _ended = control.ask(Request::End(Extent::Process));
    assert!(process.join().unwrap().is_ok());
}
