//! `--cpus core_scheduling=`: what may be on a core beside a vCPU.

use std::collections::BTreeSet;
use std::fs;
use std::thread;

use rustix::io::Errno;
use rustix::thread::{
    CoreSchedulingScope, Pid, core_scheduling_cookie, create_core_scheduling_cookie, gettid,
};
use serde_json::json;

use crate::bare::power_off;
use crate::served::{Served, lives};
use crate::whole::{Run, has_kvm, signal, stderr, wait_for_the_button};

const THREAD: CoreSchedulingScope = CoreSchedulingScope::Thread;

/// The cookies of a process's vCPUs, and of all its other threads.
fn cookies(process: u32) -> [BTreeSet<u64>; 2] {
    let mut found = [BTreeSet::new(), BTreeSet::new()];
    for task in fs::read_dir(format!("/proc/{process}/task")).unwrap() {
        let task = task.unwrap();
        let name = fs::read_to_string(task.path().join("comm")).unwrap();
        let id = task.file_name().to_str().unwrap().parse().unwrap();
        let cookie = core_scheduling_cookie(Pid::from_raw(id).unwrap(), THREAD).unwrap();
        found[usize::from(!name.starts_with("vcpu"))].insert(cookie);
    }
    found
}

#[test]
fn a_vm_has_a_cookie_and_each_vcpu_its_own_where_asked_or_the_kernel_without_is_named() {
    if !has_kvm() {
        return;
    }
    // What this kernel does with a thread that is nobody else's.
    let can = thread::spawn(|| create_core_scheduling_cookie(gettid(), THREAD));
    let can = can.join().unwrap();
    for word in ["vm", "vcpu", "off"] {
        let code = [wait_for_the_button(), power_off()].concat();
        let mut run = Run::new(&code);
        run.command
            .args(["--cpus", &format!("boot=2,core_scheduling={word}")]);
        if can == Err(Errno::INVAL) && word != "off" {
            let output = run.command.output().unwrap();
            let said = stderr(&output);
            assert_eq!(output.status.code(), Some(3), "{said}");
            for words in [&*format!("core_scheduling={word}"), "CONFIG_SCHED_CORE"] {
                assert!(said.contains(words), "{said}");
            }
            continue;
        }
        let Some((mut child, _folder)) = run.until("ready") else {
            return;
        };
        // A host whose cores run one thread at a time has no cookies.
        if can.is_ok() {
            let [vcpus, others] = cookies(child.id());
            match word {
                "vm" => assert!(vcpus == others && vcpus.len() == 1 && !vcpus.contains(&0)),
                "vcpu" => assert!(vcpus.len() == 2 && vcpus.is_disjoint(&others)),
                _ => assert!(vcpus == others && vcpus.len() == 1 && vcpus.contains(&0)),
            }
        }
        signal(&child, libc::SIGTERM);
        assert!(child.wait().unwrap().success(), "{word}");
    }
}

#[test]
fn what_is_in_effect_is_shown_whether_it_was_asked_for_or_not() {
    let can = thread::spawn(|| create_core_scheduling_cookie(gettid(), THREAD));
    let has_none = can.join().unwrap() == Err(Errno::INVAL);
    for (asked, shown) in [
        (None, if has_none { "Off" } else { "Vm" }),
        (Some("Vm"), if has_none { "Off" } else { "Vm" }),
        (Some("Off"), "Off"),
        (Some("Vcpu"), "Vcpu"),
    ] {
        let Some(served) = Served::start(&[]) else {
            return;
        };
        let mut vm = served.vm(&lives("boot"));
        if let Some(asked) = asked {
            vm["cpus"]["core_scheduling"] = json!(asked);
        }
        assert_eq!(served.ask("PUT", "vm.create", Some(&vm)).0, 204);
        let in_effect = || {
            let (_, mut info) = served.ask("GET", "vm.info", None);
            info["config"]["cpus"]["core_scheduling"].take()
        };
        // Nothing is in effect yet.
        assert_eq!(in_effect(), asked.unwrap_or("Vm"));
        let (status, said) = served.ask("PUT", "vm.boot", None);
        if has_none && asked == Some("Vcpu") {
            assert_eq!(status, 500, "{said}");
            continue;
        }
        assert_eq!(status, 204, "{said}");
        assert_eq!(in_effect(), shown, "{asked:?}");
    }
}
