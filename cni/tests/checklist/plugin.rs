//! Starts the plugin as a runtime does.

use std::{
    collections::BTreeMap,
    io::Write,
    path::Path,
    process::{Child, Command, Output, Stdio},
};

use serde_json::{Value, json};

use crate::{door::FakeDoor, netns::Netns};

/// One call, to be changed and then made.
#[derive(Clone)]
pub(crate) struct Plugin {
    host: Option<String>,
    /// Run before the plugin, in its place and in mounts of its own.
    before: Option<&'static str>,
    pub(crate) env: BTreeMap<&'static str, String>,
    pub(crate) config: Value,
    /// Instead of `config`.
    pub(crate) stdin: Option<Vec<u8>>,
}

/// How a call ended.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) exit: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Plugin {
    pub(crate) fn new(command: &str, door: &FakeDoor) -> Self {
        let env = [
            ("CNI_COMMAND", command),
            ("CNI_CONTAINERID", "c1"),
            ("CNI_IFNAME", "net1"),
            ("CNI_PATH", "/opt/cni/bin"),
        ];
        Self {
            host: None,
            before: None,
            env: env.map(|(key, value)| (key, value.to_owned())).into(),
            config: json!({
                "cniVersion": "1.1.0", "name": "weft", "type": "weft-cni", "socket": door.socket(),
            }),
            stdin: None,
        }
    }

    pub(crate) fn env(mut self, key: &'static str, value: impl AsRef<Path>) -> Self {
        self.env
            .insert(key, value.as_ref().to_str().unwrap().to_owned());
        self
    }

    pub(crate) fn unset(mut self, key: &'static str) -> Self {
        self.env.remove(key);
        self
    }

    pub(crate) fn set(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.config[key] = value.into();
        self
    }

    pub(crate) fn stdin(mut self, stdin: impl Into<Vec<u8>>) -> Self {
        self.stdin = Some(stdin.into());
        self
    }

    /// The same call with another command.
    pub(crate) fn command(self, command: &str) -> Self {
        self.env("CNI_COMMAND", command)
    }

    /// Runs on `host`, for the pod `pod`.
    pub(crate) fn on(mut self, host: &Netns, pod: &Netns) -> Self {
        self.host = Some(host.path().to_str().unwrap().to_owned());
        self.env("CNI_NETNS", pod.path())
    }

    /// Runs `script` first, with mounts that nobody else sees.
    pub(crate) fn after(mut self, script: &'static str) -> Self {
        self.before = Some(script);
        self
    }

    pub(crate) fn start(&self) -> Child {
        let plugin = env!("CARGO_BIN_EXE_weft-cni");
        let mut command = match &self.host {
            Some(host) => {
                let mut command = Command::new("nsenter");
                command.arg(format!("--net={host}"));
                if let Some(script) = self.before {
                    let script = format!("{script} && exec \"$0\"");
                    command.args(["unshare", "--mount", "sh", "-c", &script]);
                }
                command.arg(plugin);
                command
            }
            None => Command::new(plugin),
        };
        let mut child = command
            .env_clear()
            .env(
                "PATH",
                "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            )
            .envs(&self.env)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let config = self.stdin.clone();
        let config = config.unwrap_or_else(|| self.config.to_string().into_bytes());
        // A plugin that fails early may not read it all.
        let _ = child.stdin.take().unwrap().write_all(&config);
        child
    }

    pub(crate) fn run(&self) -> Answer {
        finish(self.start())
    }

    /// Runs and expects success; the JSON on stdout, or null.
    pub(crate) fn succeed(&self) -> Value {
        let answer = self.run();
        assert_eq!(answer.exit, 0, "{answer:?}");
        assert_eq!(answer.stderr, "", "{answer:?}");
        if answer.stdout.is_empty() {
            return Value::Null;
        }
        serde_json::from_str(&answer.stdout).unwrap()
    }

    /// Runs and expects a refusal; its code and message.
    pub(crate) fn fail(&self) -> (u64, String) {
        self.run().error()
    }
}

pub(crate) fn finish(child: Child) -> Answer {
    let Output {
        status,
        stdout,
        stderr,
    } = child.wait_with_output().unwrap();
    Answer {
        exit: status.code().unwrap_or(-1),
        stdout: String::from_utf8(stdout).unwrap(),
        stderr: String::from_utf8(stderr).unwrap(),
    }
}

impl Answer {
    pub(crate) fn error(&self) -> (u64, String) {
        assert_ne!(self.exit, 0, "{self:?}");
        assert_ne!(self.stderr, "", "the reason is logged too: {self:?}");
        let error: Value = serde_json::from_str(&self.stdout)
            .unwrap_or_else(|_| panic!("errors are JSON on stdout: {self:?}"));
        assert!(error["cniVersion"].is_string(), "{error}");
        let message = error["msg"].as_str().unwrap();
        let details = error["details"].as_str().unwrap_or_default();
        (
            error["code"].as_u64().unwrap(),
            format!("{message} {details}").trim().to_owned(),
        )
    }
}
