//! What is kept of a change, rules and journal: closed to others, and obeyed only where it is root's.

use super::*;

#[test]
fn a_rule_for_another_kind_of_device_moves_nothing() {
    let host = host();
    bind(&host, &mut host.kernel(), &everything()).unwrap();
    std::fs::remove_file(host.path("run/busway/devices.json")).unwrap();
    let device = host.root.device(at(DEVICES[2]));
    std::fs::write(device.join("device"), "0xbeef\n").unwrap();
    let restored = restore(&host, &mut host.kernel()).unwrap();
    assert_eq!(restored[2].outcome, Outcome::Another);
    assert_eq!(host.driver_of(DEVICES[2]).as_deref(), Some("vfio-pci"));
}

#[test]
fn no_rule_has_root_run_what_others_could_replace() {
    for (component, owner, mode, is_link) in [
        ("/usr/bin/busway", 1000, 0o755, false),
        ("/usr/bin/busway", 0, 0o775, false),
        ("/usr/bin", 0, 0o757, false),
        ("/usr", 1000, 0o755, false),
        ("/usr", 0, 0o777, true),
        ("/", 0, 0o1777, false),
    ] {
        let host = host();
        let before = state(&host);
        let mut kernel = host.kernel();
        let standing = Standing {
            owner,
            mode,
            is_link,
        };
        kernel.standing.insert(PathBuf::from(component), standing);
        let error = bind(&host, &mut kernel, &everything()).unwrap_err();
        assert!(matches!(error, BindError::Persist(_)), "{error}");
        let said = error.to_string();
        let names = format!("at each boot, and {component} ");
        assert!(
            said.contains(&names) && said.contains("install -o root"),
            "{said}"
        );
        assert!(kernel.log.is_empty(), "{:?}", kernel.log);
        assert_eq!(state(&host), before);
        // Without --persist it is nobody's business where Busway lies.
        let once = BindOptions {
            persist: None,
            ..everything()
        };
        bind(&host, &mut kernel, &once).unwrap();
    }
}

#[test]
fn what_busway_keeps_is_closed_to_all_others() {
    let mode = |path: PathBuf| {
        let metadata = std::fs::symlink_metadata(path).unwrap();
        metadata.permissions().mode() & 0o7777
    };
    let host = host();
    // As an earlier version left it.
    host.file("run/busway/lock", "1\n");
    for (name, open) in [("run/busway", 0o755), ("run/busway/lock", 0o644)] {
        let open = std::fs::Permissions::from_mode(open);
        std::fs::set_permissions(host.path(name), open).unwrap();
    }
    bind(&host, &mut host.kernel(), &everything()).unwrap();
    assert_eq!(mode(host.path("run/busway")), 0o700);
    for name in ["lock", "devices.json"] {
        assert_eq!(mode(host.path("run/busway").join(name)), 0o600, "{name}");
    }
}

#[test]
fn a_journal_that_others_could_write_is_not_obeyed() {
    let ways: [fn(&FakeHost); 3] = [
        |host| {
            let open = std::fs::Permissions::from_mode(0o666);
            std::fs::set_permissions(host.path("run/busway/devices.json"), open).unwrap();
        },
        |host| {
            let open = std::fs::Permissions::from_mode(0o777);
            std::fs::set_permissions(host.path("run/busway"), open).unwrap();
        },
        |host| {
            let (from, to) = ("run/busway/devices.json", "run/elsewhere");
            std::fs::rename(host.path(from), host.path(to)).unwrap();
            host.link(from, to);
        },
    ];
    for (number, way) in ways.iter().enumerate() {
        let host = host();
        bind(&host, &mut host.kernel(), &everything()).unwrap();
        way(&host);
        let mut kernel = host.kernel();
        let error = restore(&host, &mut kernel).unwrap_err();
        let said = error.to_string();
        assert!(said.contains("remove it as root"), "{number}: {said}");
        assert!(kernel.log.is_empty(), "{:?}", kernel.log);
    }
}
