//! Hosts on a bridge.

use std::fmt::Write;
use std::process::Command;
use std::time::Duration;

use crate::NetworkError;
use crate::host::{Host, INTERFACE};
use crate::namespace::Namespace;

/// What a network is like.
#[derive(Clone, Copy, Debug)]
pub struct NetworkConfig {
    /// How many hosts, up to 200.
    pub hosts: u8,
    /// The largest IP packet.
    pub mtu: u16,
}

/// Within this time after its query the bridge knows who listens to what, and forwards a group to its listeners alone; before
/// that it floods, as the standard has it. The usual ten seconds would be most of a test.
const QUERY_RESPONSE: Duration = Duration::from_millis(200);

/// A network, gone when dropped.
#[derive(Debug)]
pub struct Network {
    hosts: Vec<Host>,
    switch: Namespace,
}

impl Network {
    /// Builds one; waits until its bridge forwards by membership.
    ///
    /// # Errors
    /// When this machine cannot: [`crate::missing`] says why beforehand.
    pub fn new(config: NetworkConfig) -> Result<Self, NetworkError> {
        let NetworkConfig { hosts: count, mtu } = config;
        let switch = Namespace::new("switch")?;
        let mut orders = format!(
            "link set lo up\n\
             link add br0 type bridge mcast_snooping 1 mcast_query_response_interval {} forward_delay 0\n\
             link set br0 up\n",
            QUERY_RESPONSE.as_millis() / 10
        );
        let mut hosts = Vec::new();
        for number in 1..=count {
            let namespace = Namespace::new(&format!("host-{number}"))?;
            // Writing to a string cannot fail.
            let _ = write!(
                orders,
                "link add port{number} mtu {mtu} type veth peer name {INTERFACE} mtu {mtu} netns {}\n\
                 link set port{number} master br0 up\n",
                namespace.path()
            );
            hosts.push(Host { namespace, number, loss: None });
        }
        orders += "link set br0 type bridge mcast_querier 1\n";
        let batch = ["ip", "-batch", "-"];
        switch.order(&batch, &orders)?;
        for host in &hosts {
            let orders = format!(
                "link set lo up\n\
                 address add {}/24 broadcast + dev {INTERFACE}\n\
                 address add {}/64 dev {INTERFACE} nodad\n\
                 link set {INTERFACE} up\n\
                 route add default dev {INTERFACE}\n",
                host.address(),
                host.address_v6()
            );
            host.namespace.order(&batch, &orders)?;
        }
        std::thread::sleep(QUERY_RESPONSE);
        Ok(Self { hosts, switch })
    }

    /// The hosts.
    pub fn hosts(&self) -> &[Host] {
        &self.hosts
    }

    /// The hosts, to change what they lose.
    pub fn hosts_mut(&mut self) -> &mut [Host] {
        &mut self.hosts
    }

    /// The bridge's table of groups and listeners, as `bridge mdb` prints it.
    ///
    /// # Errors
    /// When it cannot be asked.
    pub fn listeners(&self) -> Result<String, NetworkError> {
        let output = self.switch.run(|| Command::new("bridge").args(["mdb", "show"]).output());
        let output = output.map_err(|error| NetworkError::Program("bridge".to_owned(), error))?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}
