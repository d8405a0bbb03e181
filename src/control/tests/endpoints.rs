//! What each endpoint answers.

use std::os::fd::AsFd;

use serde_json::json;

use super::*;

#[test]
fn a_request_on_any_path_by_any_method_with_any_body_has_one_answer_and_the_connection_goes_on() {
    // Whoever ends the VM is refused, so that it goes on for the rest.
    let vm = Vm::new(|request| match request {
        Request::Info => Some(how(State::Running)),
        Request::End(_) => Some(Err(RequestError::State("held"))),
        _ => Some(Ok(Answer::Done)),
    });
    let names = v1::ENDPOINTS.iter().map(|endpoint| endpoint.name);
    let junk = "Content-Length: 7\r\n\r\n{\"a\": [";
    let large = format!(
        "Content-Length: {}\r\n\r\n{}",
        (4 << 20) + 1,
        "x".repeat((4 << 20) + 1)
    );
    let mut client = vm.connect();
    for name in names.chain(["vm.unheard-of", ""]) {
        for method in [
            "GET", "PUT", "POST", "DELETE", "HEAD", "PATCH", "OPTIONS", "get",
        ] {
            for body in ["\r\n", "content-length: 0\r\n\r\n", junk, &large] {
                // The large one costs time, and says the same to all methods.
                if body.len() > 100 && !["GET", "PUT"].contains(&method) {
                    continue;
                }
                let start = Instant::now();
                let head = request(method, name, "");
                let request = head.trim_end().to_owned() + "\r\n" + body;
                // Where it is refused before all of it has come, the rest need not be taken.
                let _cut = client.0.write_all(request.as_bytes());
                let reply = client.reply().unwrap();
                let case = format!("{method} {name} {}", body.len());
                // An idle machine needs a millisecond; a client that waits in vain waits for ever.
                assert!(start.elapsed() < Duration::from_secs(10), "{case}");
                assert!((200..600).contains(&reply.status), "{case}");
                if method == "HEAD" {
                    assert!(reply.body.is_empty(), "{case}");
                } else if reply.status >= 400 {
                    assert!(!reply.messages()[0].is_empty(), "{case}");
                }
                if body.len() > 100 {
                    assert_eq!((reply.status, reply.keeps_alive()), (413, false), "{case}");
                    assert!(client.is_closed(), "{case}");
                    client = vm.connect();
                } else {
                    assert!(reply.keeps_alive(), "{case}");
                }
            }
        }
    }
    assert_eq!(client.ask("GET", "vmm.ping").status, 200);
}

#[test]
fn an_answers_head_is_byte_for_byte_what_clients_read() {
    let vm = Vm::living();
    let mut client = vm.connect();
    let reply = client.ask("GET", "vmm.ping");
    let length = format!("Content-Length: {}", reply.body.len());
    let expected = [
        "HTTP/1.1 200 ",
        "Server: Cloud Hypervisor API",
        "Connection: keep-alive",
        "Content-Type: application/json",
        &length,
        "",
        "",
    ];
    assert_eq!(reply.head, expected);
    let reply = client.ask("PUT", "vm.pause");
    let expected = [
        "HTTP/1.1 204 ",
        "Server: Cloud Hypervisor API",
        "Connection: keep-alive",
        "",
        "",
    ];
    assert_eq!(reply.head, expected);
    let ping = client.ask("GET", "vmm.ping").json();
    assert_eq!(ping["pid"], std::process::id());
    assert_eq!(ping["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(ping["features"], json!(["kvm"]));
}

#[test]
fn a_vm_is_paused_resumed_and_shown() {
    let vm = Vm::living();
    let mut client = vm.connect();
    let info = client.ask("GET", "vm.info").json();
    assert_eq!(info["state"], "Running");
    assert_eq!(info["memory_actual_size"], 256 << 20);
    assert_eq!(info["config"]["payload"]["kernel"], "/boot/vmlinuz");
    // By the name that it was given, which is not ASCII; the answer is.
    let device = &info["device_tree"]["drive/é"];
    assert_eq!(device["pci_bdf"], "0000:02:00.0");
    assert_eq!(device["host_bdf"], "0000:01:00.0");
    // So are virtio devices, by the names that they were given by Busway, which their configuration has too.
    assert_eq!(
        info["device_tree"]["disk0"],
        json!({ "id": "disk0", "resources": [], "children": [], "pci_bdf": "0000:00:01.0" })
    );
    assert_eq!(info["config"]["disks"][0]["id"], "disk0");
    assert_eq!(info["config"]["disks"][0]["path"], "a.raw");
    assert_eq!(client.ask("PUT", "vm.pause").status, 204);
    assert_eq!(client.ask("GET", "vm.info").json()["state"], "Paused");
    let again = client.ask("PUT", "vm.pause");
    let messages = ["The VM could not be paused", "the guest is paused"];
    assert_eq!(
        (again.status, again.messages()),
        (500, messages.map(str::to_owned).into())
    );
    assert_eq!(client.ask("PUT", "vm.resume").status, 204);
    assert_eq!(client.ask("PUT", "vm.power-button").status, 204);
    let counters = client.ask("GET", "vm.counters").json();
    let disk = &counters["disk0"];
    assert_eq!(
        (&disk["read_ops"], &disk["read_bytes"], &disk["write_ops"]),
        (&json!(2), &json!(8192), &json!(0))
    );
    assert_eq!(
        (&disk["read_latency_min"], &disk["read_latency_avg"]),
        (&json!(100), &json!(150))
    );
    assert_eq!(counters["net0"]["rx_frames"], 1);
    // What counts nothing is not there.
    assert_eq!(counters.as_object().unwrap().len(), 2);
}

#[test]
fn each_device_is_shown_with_what_is_known_of_it() {
    let vm = Vm::living();
    let answer = vm.connect().ask("GET", "vm.devices").json();
    let devices = answer["devices"].as_array().unwrap();
    let named = |id: &str| devices.iter().find(|device| device["id"] == id).unwrap();
    let drive = named("drive/é\"");
    assert_eq!(
        (&drive["host_bdf"], &drive["pci_bdf"], &drive["state"]),
        (
            &json!("0000:01:00.0"),
            &json!("0000:02:00.0"),
            &json!("present")
        )
    );
    assert_eq!(
        drive["interrupts"],
        json!({ "mode": "msi-x", "vectors": 2, "vectors_most": 3 }),
        "nobody counts those of an assigned device"
    );
    assert_eq!(drive["dma"]["mappings"], 3);
    assert_eq!(drive["exits"]["bar_writes"], 4);
    // Nothing tells which driver the guest has for it.
    assert!(drive.get("driver").is_none());
    let disk = named("disk0");
    assert_eq!(
        (&disk["driver"], &disk["interrupts"]["sent"]),
        (&json!("ready"), &json!(9))
    );
    assert!(disk.get("dma").is_none());
    for (id, state) in [
        ("bad", "held"),
        ("late", "coming"),
        ("away", "going"),
        ("dark", "off"),
    ] {
        assert_eq!(named(id)["state"], state);
    }
}

#[test]
fn what_a_vm_does_is_shown_with_its_threads() {
    let vm = Vm::living();
    let activity = vm.connect().ask("GET", "vm.activity").json();
    assert_eq!(activity["state"], "Running");
    assert_eq!(activity["uptime_ms"], 1500);
    assert_eq!(activity["vcpus"][1]["exits"]["mmio_read"], 7);
    assert_eq!(activity["vcpus"][1]["kvm"]["irq_injections"], 11);
    let threads = activity["threads"].as_array().unwrap();
    assert!(threads.iter().any(|thread| thread["name"] == "http"));
    assert_eq!(activity["devices"].as_array().unwrap().len(), 8);
}

#[test]
fn metrics_are_served_beside_the_api_with_their_own_type_and_without_a_vm_too() {
    let ask = |vm: &Vm| {
        let mut client = vm.connect();
        client.send("GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n");
        client.reply().unwrap()
    };
    let reply = ask(&Vm::living());
    assert_eq!(reply.status, 200);
    let kind = "Content-Type: application/openmetrics-text; version=1.0.0; charset=utf-8";
    assert!(reply.head.contains(&kind.to_owned()), "{:?}", reply.head);
    let text = String::from_utf8(reply.body).unwrap();
    assert!(
        text.contains("busway_vm_state{state=\"running\"} 1\n"),
        "{text}"
    );
    assert!(text.ends_with("# EOF\n"));
    let absent = Vm::new(|request| match request {
        Request::End(_) => Some(Ok(Answer::Done)),
        _ => Some(Err(RequestError::NotCreated)),
    });
    let reply = ask(&absent);
    let text = String::from_utf8(reply.body).unwrap();
    assert_eq!(reply.status, 200);
    assert!(
        text.contains("busway_vm_state{state=\"running\"} 0\n"),
        "{text}"
    );
}

#[test]
fn a_device_is_checked_in_the_words_of_the_command_line() {
    let vm = Vm::living();
    let mut client = vm.connect();
    let mut check = |body: &str| {
        let length = format!("Content-Length: {}\r\n", body.len());
        client.send(request("PUT", "vm.check-device", &length) + body);
        client.reply().unwrap()
    };
    let reply = check(r#"{"path": "/sys/bus/pci/devices/0000:02:00.0/"}"#);
    assert_eq!(reply.status, 200);
    let found = reply.json();
    assert_eq!(
        (&found["version"], &found["ready"]),
        (&json!(1), &json!(false))
    );
    let device = &found["devices"][0];
    assert_eq!(device["address"], "0000:02:00.0");
    assert_eq!(device["findings"][0]["level"], "obstacle");
    let reply = check(r#"{"path": "no-nic"}"#);
    assert_eq!(reply.status, 404);
    assert!(reply.messages()[1].contains("no-nic"), "{reply:?}");
}

#[test]
fn every_state_has_a_word_that_clients_know() {
    for (state, word, held) in [
        (State::Created, "Created", Value::Null),
        (State::Running, "Running", Value::Null),
        (State::Paused, "Paused", Value::Null),
        (State::Held, "Paused", json!(true)),
        (State::Shutdown, "Shutdown", Value::Null),
    ] {
        let vm = Vm::new(move |request| match request {
            Request::Info => Some(how(state)),
            _ => Some(Ok(Answer::Done)),
        });
        let info = vm.connect().ask("GET", "vm.info").json();
        assert_eq!((&info["state"], &info["held"]), (&json!(word), &held));
    }
}

#[test]
fn a_vm_that_has_no_memory_yet_is_shown_with_what_it_is_to_have_and_one_that_ended_has_a_last_word()
{
    let vm = Vm::new(|request| match request {
        Request::Info => {
            let config = VmConfig::default();
            let info = Info {
                config,
                ..Info::default()
            };
            Some(Ok(Answer::Info(Box::new(info))))
        }
        _ => Some(Ok(Answer::Done)),
    });
    let info = vm.connect().ask("GET", "vm.info").json();
    assert_eq!(
        (&info["state"], &info["memory_actual_size"]),
        (&json!("Created"), &json!(512 << 20))
    );
    let _ended = vm.control.ask(Request::End(Extent::Vm));
    let mut client = vm.connect();
    for (method, name) in [("PUT", "vm.pause"), ("GET", "vm.info")] {
        let refused = client.ask(method, name);
        assert_eq!(refused.status, 500);
        // What clients look for.
        assert_eq!(refused.messages().last().unwrap(), "VM is not running");
    }
}

#[test]
fn what_busway_cannot_do_yet_is_named() {
    let vm = Vm::living();
    let mut client = vm.connect();
    let mut ask = |name: &str, body: &str| {
        let length = format!("Content-Length: {}\r\n", body.len());
        client.send(request("PUT", name, &length) + body);
        client.reply().unwrap()
    };
    assert_eq!(ask("vm.resize", r#"{"desired_vcpus":2}"#).status, 204);
    let ram = r#"{"desired_ram":1073741824}"#;
    assert_eq!(ask("vm.resize", ram).status, 204);
    let reply = ask("vm.resize", r#"{"desired_ram":1}"#);
    assert_eq!(reply.status, 429);
    assert_eq!(reply.messages()[0], "The VM could not be resized");
    assert!(reply.messages()[1].starts_with("Too Many Requests"));
    let reply = ask("vm.resize", r#"{"desired_vcpus":0}"#);
    assert_eq!((reply.status, reply.messages().len()), (400, 2));
    // What Kata Containers looks for.
    let reply = ask("vm.resize", r#"{"desired_vcpus":9}"#);
    assert_eq!(reply.status, 429);
    assert!(reply.messages()[1].starts_with("Too Many Requests"));
    // Clients write out what they do not change.
    let balloon = r#"{"desired_balloon":4096,"desired_ram":null,"desired_vcpus":null}"#;
    assert_eq!(ask("vm.resize", balloon).status, 204);
    // A zone's is its whole size, and is asked for by its name.
    let zone = r#"{"id":"a","desired_ram":1610612736}"#;
    assert_eq!(ask("vm.resize-zone", zone).status, 204);
    let reply = ask("vm.resize-zone", r#"{"id":"a","desired_ram":3221225472}"#);
    assert_eq!(reply.status, 400);
    assert_eq!(reply.messages()[0], "The memory zone could not be resized");
    assert!(reply.messages()[1].contains("1073741824 to 2147483648"));
    let reply = ask("vm.resize-zone", r#"{"id":"b","desired_ram":1073741824}"#);
    assert_eq!(reply.status, 404);
    assert!(reply.messages()[1].ends_with("no memory zone `b`, only `a`"));
    assert_eq!(ask("vm.resize-zone", r#"{"id":"a"}"#).status, 400);
    let reply = ask("vm.create", r#"{"vdpa":[{"path":"/dev/vhost-vdpa-0"}]}"#);
    assert_eq!(reply.status, 501);
    let said = "Busway cannot do this yet: vDPA devices";
    assert_eq!(reply.messages(), ["The VM could not be created", said]);
    let unknown = client.ask("PUT", "vm.dance");
    assert_eq!(unknown.status, 404);
    assert_eq!(
        unknown.messages(),
        ["/api/v1/vm.dance is no path of this API"]
    );
    assert_eq!(client.ask("GET", "../v1/vmm.ping").status, 404);
}

#[test]
fn ping_and_info_answer_while_others_wait() {
    let vm = Vm::new(|request| match request {
        Request::Info => Some(how(State::Running)),
        Request::End(_) => Some(Ok(Answer::Done)),
        // For as long as the VM lives.
        _ => None,
    });
    let mut waiting: Vec<_> = (0..8).map(|_| vm.connect()).collect();
    for client in &mut waiting {
        client.send(request("PUT", "vm.pause", ""));
    }
    let (mut one, mut other) = (vm.connect(), vm.connect());
    let mut took: Vec<_> = (0..20)
        .map(|_| {
            let start = Instant::now();
            assert_eq!(one.ask("GET", "vmm.ping").status, 200);
            assert_eq!(other.ask("GET", "vm.info").status, 200);
            start.elapsed()
        })
        .collect();
    // A machine that is busy with something else may have a single one wait.
    took.sort();
    assert!(took[10] < Duration::from_millis(200), "{took:?} for both");
    // Those who wait hear of the end.
    let end = Request::End(Extent::Process);
    assert_eq!(vm.control.ask(end), Err(RequestError::Ended));
    for client in &mut waiting {
        let reply = client.reply().unwrap();
        assert_eq!(reply.status, 500);
        assert_eq!(reply.messages().last().unwrap(), "VM is not running");
    }
}

#[test]
fn who_ends_the_vm_is_answered_when_all_is_given_back_and_before_the_process_ends() {
    for (name, status) in [("vm.shutdown", 204), ("vmm.shutdown", 200)] {
        let mut vm = Vm::living();
        let mut client = vm.connect();
        client.send(request("PUT", name, ""));
        vm.machine.take().unwrap().join().unwrap();
        // The machine is gone, and its devices are being reset.
        client.0.set_nonblocking(true).unwrap();
        thread::sleep(Duration::from_millis(50));
        let early = client.0.read(&mut [0]).unwrap_err();
        assert_eq!(early.kind(), io::ErrorKind::WouldBlock, "{name}");
        client.0.set_nonblocking(false).unwrap();
        vm.finish();
        // What is on the wire when the server is done is there for good.
        let reply = client.reply().unwrap();
        assert_eq!((reply.status, reply.body.len()), (status, 0), "{name}");
        assert!(client.is_closed());
        assert!(!vm.socket.exists());
    }
}

#[test]
fn forty_vms_that_are_ended_at_once_all_answer() {
    let mut vms: Vec<_> = (0..40).map(|_| Vm::living()).collect();
    let clients: Vec<_> = vms
        .iter()
        .map(|vm| {
            let mut client = vm.connect();
            client.send(request("PUT", "vmm.shutdown", ""));
            client
        })
        .collect();
    let ending: Vec<_> = vms
        .iter_mut()
        .map(|vm| (vm.machine.take().unwrap(), vm.server.take().unwrap()))
        .map(|(machine, server)| {
            thread::spawn(move || {
                machine.join().unwrap();
                server.finish();
            })
        })
        .collect();
    for ending in ending {
        ending.join().unwrap();
    }
    for mut client in clients {
        assert_eq!(client.reply().unwrap().status, 200);
    }
}

#[test]
fn descriptors_by_number_are_refused_and_those_that_are_sent_are_closed() {
    let vm = Vm::living();
    let mut client = vm.connect();
    for (name, body) in [
        ("vm.add-net", r#"{"fds":[0,1,2],"num_queues":2}"#),
        ("vm.add-device", r#"{"fd":2}"#),
        ("vm.pause", r#"{"fds":[0,1,2]}"#),
    ] {
        let length = format!("Content-Length: {}\r\n", body.len());
        client.send(request("PUT", name, &length) + body);
        assert!(client.reply().unwrap().status >= 400, "{name}");
    }
    for number in 0..3 {
        assert!(std::fs::metadata(format!("/proc/self/fd/{number}")).is_ok());
    }
    // The reader sees the pipe's end as soon as no copy of the writer is open any more.
    let (mut reader, writer) = io::pipe().unwrap();
    for _ in 0..3 {
        let text = request("PUT", "vm.pause", "Content-Length: 0\r\n");
        client.send_with(&text, &[writer.as_fd(); 64]);
        assert!([204, 500].contains(&client.reply().unwrap().status));
    }
    drop(writer);
    assert_eq!(reader.read(&mut [0]).unwrap(), 0);
}

#[test]
fn a_removal_has_the_time_that_is_asked_for_within_a_range() {
    let seen = Arc::new(std::sync::Mutex::new(Vec::new()));
    let vm = Vm::new({
        let seen = Arc::clone(&seen);
        move |request| {
            if let Request::RemoveDevice { limit, .. } = request {
                seen.lock().unwrap().push(*limit);
            }
            Some(Ok(Answer::Done))
        }
    });
    let mut client = vm.connect();
    for (asked, status) in [
        ("", 204),
        (r#","timeout_s":null"#, 204),
        (r#","timeout_s":1"#, 204),
        (r#","timeout_s":3600"#, 204),
        (r#","timeout_s":0"#, 400),
        (r#","timeout_s":3601"#, 400),
        (r#","timeout_s":-1"#, 400),
        (r#","timeout_s":"30""#, 400),
    ] {
        let body = format!(r#"{{"id":"drive"{asked}}}"#);
        let length = format!("Content-Length: {}\r\n", body.len());
        client.send(request("PUT", "vm.remove-device", &length) + &body);
        let reply = client.reply().unwrap();
        assert_eq!(reply.status, status, "{body}");
    }
    let seconds = |seconds| Some(Duration::from_secs(seconds));
    assert_eq!(
        *seen.lock().unwrap(),
        [None, None, seconds(1), seconds(3600)]
    );
}

#[test]
fn descriptors_come_with_the_request_for_a_nic_or_a_disk_and_with_no_other() {
    let seen = Arc::new(std::sync::Mutex::new(Vec::new()));
    let vm = Vm::new({
        let seen = Arc::clone(&seen);
        move |request| match request {
            Request::AddVirtio(config, files) => {
                seen.lock().unwrap().push(files.all().len());
                Some(added_virtio(config))
            }
            _ => Some(Ok(Answer::Done)),
        }
    });
    let mut client = vm.connect();
    let (mut reader, writer) = io::pipe().unwrap();
    let sent = [writer.as_fd(); 2];
    let body = r#"{"num_queues":4,"fds":[27,28]}"#;
    let head = request(
        "PUT",
        "vm.add-net",
        &format!("Content-Length: {}\r\n", body.len()),
    );
    client.send_with(&head, &sent);
    client.send(body);
    assert_eq!(client.reply().unwrap().status, 200);
    let body = r#"{"path":"/a.raw"}"#;
    let length = format!("Content-Length: {}\r\n", body.len());
    client.send_with(&(request("PUT", "vm.add-disk", &length) + body), &sent[..1]);
    assert_eq!(client.reply().unwrap().status, 400, "two say which");
    for (count, status) in [(1, 200), (2, 400)] {
        let length = format!("Content-Length: {}\r\n", 2);
        client.send_with(
            &(request("PUT", "vm.add-disk", &length) + "{}"),
            &sent[..count],
        );
        assert_eq!(client.reply().unwrap().status, status, "a disk has one");
        client.send_with(
            &(request("PUT", "vm.add-device", &length) + "{}"),
            &sent[..count],
        );
        assert_eq!(client.reply().unwrap().status, 400, "a pipe is no device");
    }
    // What came with one is not another's.
    client.send(request("PUT", "vm.add-disk", &length) + body);
    assert_eq!(client.reply().unwrap().status, 200);
    assert_eq!(*seen.lock().unwrap(), [2, 1, 0]);
    drop(writer);
    assert_eq!(reader.read(&mut [0]).unwrap(), 0);
}
