//! After a restore: takes a certificate that the lost store issued as the
//! identity's current one, once. `restored.rs` says which.

use std::sync::Arc;

use fleet_kms_identity::{Certificate, Subject};
use fleet_kms_keyring::ClusterId;

use super::{IssueFailure, Issuer, write_identity};
use crate::enrolment::{audit_trail, tokens};
use crate::identities;
use crate::ledger::Changeset;
use crate::max_offline::MaxOffline;
use crate::records::Record;
use crate::records::payload::{IdentityRecord, IssuedCertificate};
use crate::times::to_ms;

impl Issuer {
    /// Takes the certificate as its identity's current one, if the store was
    /// restored and has forgotten it. Says whether it did; a failure is logged
    /// and means no.
    pub async fn readopt(self: &Arc<Self>, shown: &Certificate) -> bool {
        let now = self.now();
        let (number, known) = (shown.serial().issue_number(), self.identities.find(shown.id()));
        let Some(restored) = self.identities.restored() else { return false };
        // Memory first, which knows no cluster's time: most certificates that are asked about are refused.
        if !restored.readopts(known.as_deref(), number, now, MaxOffline::MAX) {
            return false;
        }
        // In a task: what is committed must be published even if the caller hangs up.
        let (issuer, shown) = (Arc::clone(self), shown.clone());
        tokio::spawn(async move { issuer.readopt_to_end(&shown).await }).await.unwrap_or(false)
    }

    async fn readopt_to_end(&self, shown: &Certificate) -> bool {
        let _turn = self.turn.lock().await;
        // Judged before an intent is written: most that are refused come again and again.
        match self.prepare_readopt(shown).await {
            Ok((_, Some(_))) => {}
            // Memory may be behind the store; if it is, the caller is asked again with what the store says.
            Ok((_, None)) => return self.refresh(shown.id()).await.is_ok(),
            Err(error) => return refused(shown, &error),
        }
        let intent = audit_trail::readopt(shown);
        let run = self.changes.run_with_revision(intent, || self.prepare_readopt(shown)).await;
        let published = run.map_err(IssueFailure::flatten::<IssueFailure>).and_then(|(record, revision)| {
            record.map_or(Ok(false), |record| self.publish(record, revision).map(|()| true))
        });
        published.unwrap_or_else(|error| refused(shown, &error))
    }

    /// Judges again by what the store says now.
    async fn prepare_readopt(
        &self,
        shown: &Certificate,
    ) -> Result<(Changeset, Option<Record<IdentityRecord>>), IssueFailure> {
        let mut changeset = self.ledger().changeset();
        let (id, now) = (shown.id(), self.now());
        let before = self.identity(id).await?;
        let known = before.as_ref().map(identities::parse).transpose()?;
        let Some(restored) = self.identities.restored() else { return Ok((changeset, None)) };
        let max_offline = self.max_offline(id).await?.unwrap_or(MaxOffline::DEFAULT).time();
        let takes = restored.readopts(known.as_ref(), shown.serial().issue_number(), now, max_offline);
        if !takes || (before.is_none() && !self.is_node_of_a_live_cluster(shown).await?) {
            return Ok((changeset, None));
        }
        let current = IssuedCertificate {
            serial: shown.serial().as_bytes().to_vec(),
            spki_sha256: shown.spki_sha256().to_vec(),
            not_after_ms: to_ms(shown.not_after()),
            chain: Vec::new(),
        };
        let base = before.as_ref().map_or_else(IdentityRecord::default, |record| record.payload.clone());
        let after = IdentityRecord {
            id: id.to_string(),
            current: Some(current),
            next: None,
            created_ms: if before.is_some() { base.created_ms } else { to_ms(now) },
            // Without the chain nothing can be handed out again for it.
            token: Vec::new(),
            readopted_ms: to_ms(now),
            ..base
        };
        let record = write_identity(&mut changeset, id, before.as_ref(), after);
        Ok((changeset, Some(record)))
    }

    /// An admin without a row has no roles, so only nodes come back that way.
    async fn is_node_of_a_live_cluster(&self, shown: &Certificate) -> Result<bool, IssueFailure> {
        let Subject::Node { cluster, .. } = &shown.id().subject else { return Ok(false) };
        let cluster = ClusterId::from_bytes(*cluster.as_bytes());
        Ok(tokens::live_cluster(&self.changes, &cluster).await?.is_some())
    }
}

fn refused(shown: &Certificate, error: &IssueFailure) -> bool {
    let error = crate::errors::chain(error);
    tracing::error!(id = %shown.id(), error, "a certificate from before the restore was not taken");
    false
}
